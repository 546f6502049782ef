"""Hosts: published layouts that several families share and fill with their own token mixer.

A host is a function from sizes and mixers to a `Host`: the skeleton, its options, and how the files of that layout name
what is the skeleton's. A family adds its mixers, their names and its variants.
"""
