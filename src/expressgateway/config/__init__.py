"""The configuration: what may be written in the file, how it is read, and how mistakes in it are explained.

`load.load` is the door; `schema.Config` is what comes out of it.
"""
