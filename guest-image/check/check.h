/* What the two halves of the kernel check share: one line a check, and a count of the failures. */
#ifndef HUSK_CHECK_H
#define HUSK_CHECK_H

#include <stdbool.h>

/* Prints "ok NAME" or "FAIL NAME: errno text", and returns `passed`. */
bool check(const char *name, bool passed);

/* Links, addresses and firewall rules, made over netlink as a container engine would. */
void check_network(void);

#endif
