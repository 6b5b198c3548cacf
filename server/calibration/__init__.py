"""`mull calibrate`: a pool of samples, and what it says of new problems."""
