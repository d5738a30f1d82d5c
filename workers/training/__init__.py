"""What recipes share: the training loop, the lessons of the scene models, a tokenizer of words."""
