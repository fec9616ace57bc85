"""What ``maskcompile.learn`` is made of: recording a sampler, the paper's scores, the search, checkpoints, processes."""
