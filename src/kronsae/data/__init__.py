"""From text to activations: stages that are iterables of ``(item, state)``, each usable alone.

Put in a row::

    language_model = load_model(ModelConfig(name="EleutherAI/pythia-160m"))
    make_text = partial(TextStream, TextConfig(source="HuggingFaceFW/fineweb-edu"))
    make_tokens = partial(
        TokenStream, make_text, language_model.tokenizer, context_length=512, batch_sequences=16, pool_tokens=2**20
    )
    make_activations = partial(ActivationStream, language_model, ["layers.6"], make_tokens)
    for values, state in ShuffleBuffer(make_activations, batch_size=4096, buffer_tokens=1_000_000):
        values["layers.6"]  # [4096, 768], float32; state: where to go on after this batch

``sources`` and ``text`` read documents, ``tokens`` cuts them into windows, in the order of the text or shuffled,
``model`` loads the model and finds its modules, ``harvest`` runs it, ``buffer`` shuffles activations, ``shuffle``
has the order of both, ``store`` keeps activations on disk.
"""
