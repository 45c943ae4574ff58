"""What is computed: nodes, trees, the tracer, the verifier, text, and the plain interpreter."""
