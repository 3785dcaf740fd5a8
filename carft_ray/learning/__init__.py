"""Training of one model: loss, optimizer, checkpoints, mixing of weights; in ``models`` the models themselves."""
