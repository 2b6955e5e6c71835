# SPDX-License-Identifier: Apache-2.0
"""`python -m pyfmt` is the command `pyfmt`."""

from pyfmt.cli import main

if __name__ == "__main__":
    main()
