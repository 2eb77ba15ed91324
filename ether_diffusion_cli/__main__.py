"""`python -m ether_diffusion_cli`, and the module that `accelerate launch -m` takes from an installed wheel."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
