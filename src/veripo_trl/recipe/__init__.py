"""What the training recipes share: arguments, building encoder and trainer, held-out evaluation, the end of a run."""
