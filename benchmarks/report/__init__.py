"""The figures of the documents, written from the result files by one command."""
