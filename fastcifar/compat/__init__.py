"""Drop-in shims: a peer's class names, arguments and state_dict keys over our kernels. Import the one you need."""
