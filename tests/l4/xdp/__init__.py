"""The XDP program and its loader, by `BPF_PROG_TEST_RUN`: a frame in, a verdict and a frame out."""
