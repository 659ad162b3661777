"""What the training recipes share: options, rows, building policy and encoder, held-out evaluation, the end of a run.

What knows a stage's script or its YAML by name belongs into `recipes/`.
"""
