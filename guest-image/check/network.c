/*
 * The network half of the kernel check: socket families, virtual interfaces, and firewall rules of nftables and of
 * iptables-nft, through the same netlink messages that ip, nft and iptables send.
 */
#define _GNU_SOURCE
#include "check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nf_tables_compat.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/veth.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* Messages under construction; all are small. */
static struct {
    _Alignas(8) char bytes[4096];
    size_t length;
} out;

static void *append(const void *data, size_t length)
{
    char *place = out.bytes + out.length;

    memset(place, 0, NLMSG_ALIGN(length));
    if (data)
        memcpy(place, data, length);
    out.length += NLMSG_ALIGN(length);
    return place;
}

static struct nlmsghdr *begin(uint16_t type, uint16_t flags)
{
    struct nlmsghdr *message = append(NULL, sizeof *message);

    message->nlmsg_type = type;
    message->nlmsg_flags = NLM_F_REQUEST | flags;
    return message;
}

static void end(struct nlmsghdr *message)
{
    message->nlmsg_len = (uint32_t)(out.bytes + out.length - (char *)message);
}

static struct nlattr *attribute(uint16_t type, const void *data, size_t length)
{
    struct nlattr header = {.nla_len = (uint16_t)(sizeof header + length), .nla_type = type};
    struct nlattr *place = append(&header, sizeof header);

    append(data, length);
    return place;
}

static void text(uint16_t type, const char *value)
{
    attribute(type, value, strlen(value) + 1);
}

static void number(uint16_t type, uint32_t value)
{
    value = htonl(value);
    attribute(type, &value, sizeof value);
}

static struct nlattr *nest(uint16_t type)
{
    return attribute(type | NLA_F_NESTED, NULL, 0);
}

static void end_nest(struct nlattr *outer)
{
    outer->nla_len = (uint16_t)(out.bytes + out.length - (char *)outer);
}

/* Sends what was built and waits for `answers` acknowledgements; the first refusal is errno. */
static bool send_all(int family, int answers)
{
    char in[8192];
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, family), error = 0;
    struct timeval patience = {.tv_sec = 10};

    if (fd < 0)
        return false;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (send(fd, out.bytes, out.length, 0) < 0)
        error = errno;
    while (answers > 0 && error == 0) {
        ssize_t length = recv(fd, in, sizeof in, 0);
        struct nlmsghdr *message = (struct nlmsghdr *)in;

        if (length < 0)
            error = errno;
        for (; length > 0 && NLMSG_OK(message, length); message = NLMSG_NEXT(message, length)) {
            if (message->nlmsg_type == NLMSG_ERROR)
                error = -((struct nlmsgerr *)NLMSG_DATA(message))->error;
            answers--;
            if (error)
                break;
        }
    }
    close(fd);
    errno = error;
    return error == 0;
}

/* `ip link add NAME type KIND`, on top of interface `parent` when that is not 0. */
static bool add_link(const char *kind, const char *name, uint32_t parent)
{
    struct ifinfomsg link = {.ifi_family = AF_UNSPEC};
    struct nlmsghdr *message;
    struct nlattr *info;

    out.length = 0;
    message = begin(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK);
    append(&link, sizeof link);
    text(IFLA_IFNAME, name);
    if (parent)
        attribute(IFLA_LINK, &parent, sizeof parent);
    info = nest(IFLA_LINKINFO);
    text(IFLA_INFO_KIND, kind);
    end_nest(info);
    end(message);
    return send_all(NETLINK_ROUTE, 1);
}

static bool tun(void)
{
    struct ifreq request = {.ifr_name = "tun0", .ifr_flags = IFF_TUN | IFF_NO_PI};
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);

    return fd >= 0 && ioctl(fd, TUNSETIFF, &request) == 0;
}

static struct nlmsghdr *nft(uint16_t type, uint16_t flags, uint8_t family, uint16_t resource)
{
    struct nlmsghdr *message = begin(type, flags);
    struct nfgenmsg head = {.nfgen_family = family, .version = NFNETLINK_V0, .res_id = htons(resource)};

    append(&head, sizeof head);
    return message;
}

static struct nlmsghdr *nft_new(uint16_t type, uint8_t family)
{
    return nft((uint16_t)(NFNL_SUBSYS_NFTABLES << 8 | type), NLM_F_CREATE | NLM_F_ACK, family, 0);
}

static void batch(uint16_t type)
{
    end(nft(type, 0, AF_UNSPEC, NFNL_SUBSYS_NFTABLES));
}

/* One expression of a rule; its attributes follow until end_expression. */
static struct nlattr *expression[2];

static void begin_expression(const char *name)
{
    expression[0] = nest(NFTA_LIST_ELEM);
    text(NFTA_EXPR_NAME, name);
    expression[1] = nest(NFTA_EXPR_DATA);
}

static void end_expression(void)
{
    end_nest(expression[1]);
    end_nest(expression[0]);
}

/* table FAMILY NAME { chain post { type nat hook postrouting priority 100; ct state …; masquerade } } */
static bool masquerade(uint8_t family)
{
    struct nlmsghdr *message;
    struct nlattr *list, *hook;

    out.length = 0;
    batch(NFNL_MSG_BATCH_BEGIN);

    message = nft_new(NFT_MSG_NEWTABLE, family);
    text(NFTA_TABLE_NAME, "husk");
    end(message);

    message = nft_new(NFT_MSG_NEWCHAIN, family);
    text(NFTA_CHAIN_TABLE, "husk");
    text(NFTA_CHAIN_NAME, "post");
    hook = nest(NFTA_CHAIN_HOOK);
    number(NFTA_HOOK_HOOKNUM, NF_INET_POST_ROUTING);
    number(NFTA_HOOK_PRIORITY, 100);
    end_nest(hook);
    text(NFTA_CHAIN_TYPE, "nat");
    end(message);

    message = nft_new(NFT_MSG_NEWRULE, family);
    text(NFTA_RULE_TABLE, "husk");
    text(NFTA_RULE_CHAIN, "post");
    list = nest(NFTA_RULE_EXPRESSIONS);
    begin_expression("ct");
    number(NFTA_CT_DREG, NFT_REG_1);
    number(NFTA_CT_KEY, NFT_CT_STATE);
    end_expression();
    begin_expression("masq");
    end_expression();
    end_nest(list);
    end(message);

    batch(NFNL_MSG_BATCH_END);
    return send_all(NETLINK_NETFILTER, 3);
}

/* Whether iptables-nft can use a match or target of the older kind, in any revision: what it asks itself. */
static bool xtables(const char *name, bool target)
{
    bool found = false;

    for (uint32_t revision = 0; revision < 4 && !found; revision++) {
        struct nlmsghdr *message;

        out.length = 0;
        message = nft(NFNL_SUBSYS_NFT_COMPAT << 8 | NFNL_MSG_COMPAT_GET, NLM_F_ACK, AF_INET, 0);
        text(NFTA_COMPAT_NAME, name);
        number(NFTA_COMPAT_REV, revision);
        number(NFTA_COMPAT_TYPE, target);
        end(message);
        found = send_all(NETLINK_NETFILTER, 1);
    }
    return found;
}

void check_network(void)
{
    static const struct {
        const char *name;
        int family, type, protocol;
    } sockets[] = {
        {"IPv4", AF_INET, SOCK_STREAM, 0},
        {"IPv6", AF_INET6, SOCK_STREAM, 0},
        {"unix", AF_UNIX, SOCK_SEQPACKET, 0},
        {"packet", AF_PACKET, SOCK_RAW, 0},
        {"vsock", AF_VSOCK, SOCK_STREAM, 0},
        {"raw ICMP", AF_INET, SOCK_RAW, IPPROTO_ICMP},
        {"route netlink", AF_NETLINK, SOCK_RAW, NETLINK_ROUTE},
        {"socket diagnosis", AF_NETLINK, SOCK_RAW, NETLINK_SOCK_DIAG},
        {"uevent netlink", AF_NETLINK, SOCK_RAW, NETLINK_KOBJECT_UEVENT},
    };
    static const char *const targets[] = {"MASQUERADE", "REDIRECT", "DNAT", "SNAT", "MARK", "REJECT"};
    static const char *const matches[] = {
        "addrtype", "comment", "conntrack", "multiport", "owner", "state", "statistic", "mark",
    };
    char name[64];

    for (size_t i = 0; i < sizeof sockets / sizeof *sockets; i++) {
        int fd = socket(sockets[i].family, sockets[i].type | SOCK_CLOEXEC, sockets[i].protocol);

        snprintf(name, sizeof name, "socket %s", sockets[i].name);
        check(name, fd >= 0);
        if (fd >= 0)
            close(fd);
    }
    check("link dummy", add_link("dummy", "dummy0", 0) /* also: the kernel made none by itself */);
    check("link bridge", add_link("bridge", "bridge0", 0));
    check("link veth", add_link("veth", "left", 0));
    check("link macvlan", add_link("macvlan", "macvlan0", if_nametoindex("left")));
    check("link ipvlan", add_link("ipvlan", "ipvlan0", if_nametoindex("dummy0")));
    check("link tun", tun());
    check("nftables masquerade, inet", masquerade(NFPROTO_INET));
    check("nftables masquerade, ip", masquerade(NFPROTO_IPV4));
    check("nftables masquerade, ip6", masquerade(NFPROTO_IPV6));
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) {
        snprintf(name, sizeof name, "iptables target %s", targets[i]);
        check(name, xtables(targets[i], true));
    }
    for (size_t i = 0; i < sizeof matches / sizeof *matches; i++) {
        snprintf(name, sizeof name, "iptables match %s", matches[i]);
        check(name, xtables(matches[i], false));
    }
}
