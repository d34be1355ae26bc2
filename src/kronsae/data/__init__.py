"""Read text, run a language model and yield its activations in resumable stages.

Each stage is an iterable of ``(item, state)`` and can be used alone. A complete pipeline::

    language_model = load_model(ModelConfig(name="EleutherAI/pythia-160m"))
    make_text = partial(TextStream, TextConfig(source="HuggingFaceFW/fineweb-edu"))
    make_tokens = partial(
        TokenStream, make_text, language_model.tokenizer, context_length=512, batch_sequences=16, pool_tokens=2**20
    )
    make_activations = partial(ActivationStream, language_model, ["layers.6"], make_tokens)
    for values, state in ShuffleBuffer(make_activations, batch_size=4096, buffer_tokens=1_000_000):
        values["layers.6"]  # [4096, 768], float32; state: resumes after this batch

``sources`` and ``text`` read documents. ``tokens`` cuts them into windows, in text order or shuffled. ``model`` loads
the model and finds its modules, and ``harvest`` runs it. ``store`` writes activations to a local or remote folder
(``places``) with a ``manifest`` in some ``precision``, and ``stored`` reads them, ahead in a thread (``prefetch``).

Training data is shuffled in three places: windows of tokens before the model, in a pool (``tokens.TokenStream``);
activations after it, in a buffer (``buffer.ShuffleBuffer``); and stored activations, all at once
(``buffer.EpochRows``) or in the buffer like those of the model. ``shuffle`` defines the order of the first two.
"""
