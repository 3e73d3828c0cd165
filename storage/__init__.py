"""The target cache: what it holds, how pixels and cells correspond, how it is written and read.

Nothing here knows of torch, of networks or of the command line.
"""
