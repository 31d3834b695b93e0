"""What carries masks on: peft, quantization, lm-eval, optimum-cli and trackers, each imported where it is used."""
