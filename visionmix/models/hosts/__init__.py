"""The published hosts that mixers were put into: options of a skeleton, and the names in their files."""
