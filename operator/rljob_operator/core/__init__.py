"""What the operator decides, as pure functions: observed state and `now` in, a plan out. No I/O, no clock, no randomness."""
