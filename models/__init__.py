"""The models: name -> "module:Config". One file is one paper's figure."""

if __name__ == "models":
    raise ImportError("import effattn.models: the bare name would load every module twice")

MODELS = {
    "parscale": "effattn.models.parscale:ParScaleConfig",
    "aaren": "effattn.models.aaren:AarenModelConfig",
    "rat": "effattn.models.rat:RATModelConfig",
    "lightning": "effattn.models.lightning:LightningModelConfig",
    "mamba2": "effattn.models.mamba2:Mamba2Config",
    "tokenformer": "effattn.models.tokenformer:TokenFormerConfig",
    "adaptive_width": "effattn.models.adaptive_width:AdaptiveWidthConfig",
    "mrt5": "effattn.models.mrt5:MrT5Config",
    "routing": "effattn.models.routing:RoutingModelConfig",
    "word_pooled": "effattn.models.word_pooled:WordPooledConfig",
    "transformer": "effattn.models.transformer:TransformerConfig",
    "based": "effattn.models.based:BasedModelConfig",
    "moe": "effattn.models.moe:MoEConfig",
    "mor": "effattn.models.mor:MoRConfig",
    "hnet": "effattn.models.hnet:HNetConfig",
    "nat": "effattn.models.nat:NATConfig",
}
