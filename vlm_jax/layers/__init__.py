"""The parts of the literature, one a file. Axes have these letters, in einsum strings and shape comments of the whole library:

    B  rows of a batch                         D  width of the model, or of a part
    M  media of a row                          O  another width: of what a projection gives, of another part's tokens
    I  images of a medium: frames or tiles     F  hidden width of a feed-forward
    P  patches, or features, of an image       E  experts
    R  visual tokens of a medium; latents      L  layers of a stack
    T  tokens of text; queries                 V  vocabulary
    S  keys; slots of a cache                  N  query heads
    U  tokens before images are expanded       K  key/value heads; G = N / K
    Z  width of a joint embedding              H  width of a head; Q of its part that is rotated

Other sizes are words: `[B, height, width, 3]`, `[texts, T]`. Tables of names have a few more letters (`interop/table.py`).
"""
