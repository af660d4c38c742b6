"""The experiments of `curation.reproduce`."""
