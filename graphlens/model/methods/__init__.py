"""The public methods of HookedTransformer by subject: flat mixins, each of which needs the model's ``runner`` alone."""
