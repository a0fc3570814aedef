"""The path to vision-language-action models: a policy in OpenVLA's form, and the worlds LIBERO and SimplerEnv."""
