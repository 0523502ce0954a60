"""The only code that imports a framework and knows its versions. Users never import this package.

One file per framework; `_require.py` knows which releases are supported and how a user gets one.
"""
