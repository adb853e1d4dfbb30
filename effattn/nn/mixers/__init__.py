"""The registered sequence mixers: name -> "module:Config".

A config has plain fields and `build(width, *, sequence, dtype, rngs)`. The laws in
`tests/test_laws.py` run over this table; `pkgutil.resolve_name` turns an entry into its class.
"""

MIXERS = {
    "aaren": "effattn.nn.mixers.aaren:AarenConfig",
    "attention": "effattn.nn.mixers.attention:AttentionConfig",
    "based": "effattn.nn.mixers.based:BasedConfig",
    "delta": "effattn.nn.mixers.delta:DeltaConfig",
    "gla": "effattn.nn.mixers.gla:GLAConfig",
    "jrt": "effattn.nn.mixers.jrt:JRTConfig",
    "lightning": "effattn.nn.mixers.lightning:LightningConfig",
    "neighborhood": "effattn.nn.mixers.neighborhood:NeighborhoodConfig",
    "ponet": "effattn.nn.mixers.ponet:PoNetConfig",
    "rat": "effattn.nn.mixers.rat:RATConfig",
    "routing": "effattn.nn.mixers.routing:RoutingConfig",
    "short_conv": "effattn.nn.mixers.short_conv:ShortConvConfig",
    "ssd": "effattn.nn.mixers.ssd:SSDConfig",
}
