"""One harness for every figure that the project states. See ``README.md`` beside this file."""
