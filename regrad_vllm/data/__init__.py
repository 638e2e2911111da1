"""Questions, answers and the documents they are about: one format for training and evaluation."""
