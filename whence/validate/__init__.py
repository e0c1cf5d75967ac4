"""Is it true? Scores beside what retraining says, with intervals and negative controls."""
