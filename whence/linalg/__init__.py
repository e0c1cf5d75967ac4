"""Pure mathematics on tensors: no module, no file, no rank."""
