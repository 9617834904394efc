"""Methods that factor weight matrices."""
