#!lua flags=allow-oom
-- parts: events counts queue moves create hooks ends history progress settle
-- ARGV: one packed settle each. Returns refusals, flat: position, text.
local refused = settle(1, #ARGV)
write_counts()
return refused
