"""VerIPO on top of Hugging Face TRL. Import the submodules; this package itself stays light."""
