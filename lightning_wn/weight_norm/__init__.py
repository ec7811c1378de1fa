"""Weight normalization: reparametrize modules as w = g · v / ‖v‖ and fold them back."""
