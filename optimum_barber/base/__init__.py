"""What every room uses: errors, names, files, processes. Neither torch models nor text."""
