"""What server and client share. It imports no code of either, and no opacus."""
