"""Every policy with the scopes that it takes, the published one first: what the tests go through."""

SCOPES = {
    "streaming": ["token"],
    "h2o": ["head", "layer", "token"],
    "tova": ["layer", "head", "token"],
    "snapkv": ["head", "layer", "token"],
    "a2sf": ["head", "layer", "token"],
    "vatp": ["head", "layer"],
    "caote": ["head", "layer"],
    "fastcaote": ["head", "layer"],
    "pagedeviction": ["layer", "token"],
    "keydiff": ["head", "layer"],
    "knorm": ["head", "layer"],
    "rkv": ["head"],
    "lagkv": ["head", "layer", "token"],
    "external": ["head", "layer", "token"],
    "random": ["token", "layer", "head"],
}
