"""Links between processes: frames, channels, and what is said over them."""
