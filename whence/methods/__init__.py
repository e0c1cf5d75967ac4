"""Methods that are a few lines over points, operators and scores; each file is one."""
