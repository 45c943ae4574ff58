"""From programs to machine code. So far: elementary functions on vector registers."""
