"""MetaMorph as a model of evaluation suites. The suites themselves are no dependencies."""
