"""How good the answers are: a benchmark through lm-eval, and base beside tuned on one's own prompts."""
