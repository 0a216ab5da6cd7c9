"""What a training run consists of besides its loop: its records, its state, its place in the data, its guards."""
