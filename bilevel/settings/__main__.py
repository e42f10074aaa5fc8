from bilevel.settings.fields import FIELDS

print("\n".join(FIELDS))
