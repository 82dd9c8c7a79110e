"""CUDA C++ text to cubins (`jit`), and what is kept on disk: those (`cache`), and measured choices (`kept`)."""
