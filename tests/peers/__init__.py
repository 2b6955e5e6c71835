# SPDX-License-Identifier: Apache-2.0
"""What other libraries compute, predicted from pyfmt's parts and the listed differences."""
