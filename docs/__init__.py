"""Pictures of the documentation, and the tables that it takes from the registries."""
