# %% [markdown]
# # Test
#
# hello [patching](../patching.md)

# %%
print(3)
4
