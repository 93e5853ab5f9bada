"""The XDP data plane: layer 4 in the kernel, in front of the listeners that do the same in user space.

`bpf/` is the program, in C, with the object that is made of it (`make bpf`); `bpf/layout.h` declares its
maps, and `layout` is the same in Python. `libbpf` is the one door to the library that loads objects and talks
to the kernel. Nothing here is needed, nor imported, where no listener asks for it.
"""
