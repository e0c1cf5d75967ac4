"""Small replicas of the experiments on multi-stage influence, one command each; see README.md."""
