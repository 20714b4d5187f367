/*
 * load.c - a small single-threaded epoll load generator for echo servers on 127.0.0.1.
 *
 *   load MODE [-p port] [-c conns] [-m bytes] [-l bytes] [-k count] [-b batch] [-t seconds] [-w window] [-e] [-T]
 *
 * MODE is one of
 *   pingpong  one M-byte message in flight per connection, echoed back
 *   lines     every connection sends a batch of B CRLF-ended lines of M bytes (CRLF included) and waits until the whole
 *             batch is echoed; with -l L each message is a line of L bytes (CRLF included) and a body of M - L bytes,
 *             and both are counted
 *   bulk      stream as fast as possible, at most W bytes in flight per connection, count the bytes echoed
 *   churn     connect, send one M-byte CRLF-ended line, read the echo, close
 *   idle      open C connections (-e: exchange one line on each), print "ESTABLISHED n", hold until stdin ends or
 *             T seconds are over
 *   dribble   one connection sends ONE line of K bytes in pieces of M bytes (each its own segment, as far as TCP_NODELAY
 *             can make it), then CRLF; waits for the echo: shows O(n^2) delimiter scans
 *
 * A run ends after K operations or T seconds, whichever comes first. All echoes are compared with what was sent. One JSON
 * object is printed. -T speaks TLS, in every mode but churn, whatever certificate the server has; for that compile with
 * -DWITH_TLS and link with -lssl -lcrypto.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef WITH_TLS
#include <openssl/ssl.h>
#endif

typedef struct {
    int fd, idx, want_out, st;
    size_t out, in;          /* bytes sent / received of the current unit */
    uint64_t t0;
#ifdef WITH_TLS
    SSL *ssl;                /* NULL without TLS */
#endif
} conn;

static int port = 9000, nconn = 1, batch = 100, exch = 0, tls = 0;
static size_t msg = 64, head = 0, window = 4u << 20;
static uint64_t count = 1000000000ull;
static double tmax = 1.0;
static int ep;
static struct sockaddr_in sa;
static char *pat;            /* the unit: a message or a batch of lines */
static size_t unit;
static uint32_t *lat;        /* latencies, in 1/100 microseconds */
static size_t nlat, caplat;
static uint64_t ops, bytes, errors, lost;
static char rbuf[1 << 18];
#ifdef WITH_TLS
static SSL_CTX *ctx;
#endif

static uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000ull + ts.tv_nsec;
}
static void die(const char *what) {
    printf("{\"error\": \"%s: %s\"}\n", what, strerror(errno));
    exit(1);
}
static void add_lat(uint64_t ns) {
    if (nlat < caplat) { uint64_t v = ns / 10; lat[nlat++] = v > 0xffffffffu ? 0xffffffffu : (uint32_t)v; }
}
static int cmp32(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}
static int open_sock(int i) {
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    if (fd < 0) die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    /* many source addresses, so that ports in TIME_WAIT do not run out */
    struct sockaddr_in me = {.sin_family = AF_INET};
    setsockopt(fd, SOL_IP, 24 /* IP_BIND_ADDRESS_NO_PORT */, &one, sizeof one);
    me.sin_addr.s_addr = htonl(0x7f000100u + 2 + (unsigned)(i % 200));
    if (bind(fd, (struct sockaddr *)&me, sizeof me) < 0) die("bind");
    return fd;
}
static void nonblock(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }
static void watch(conn *c, int op, int out) {
    struct epoll_event e = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
    c->want_out = out;
    if (epoll_ctl(ep, op, c->fd, &e) < 0) die("epoll_ctl");
}
/* as recv and send; with TLS less than was asked for may be all there is in one record, so only EAGAIN tells that there is no more */
#ifdef WITH_TLS
static ssize_t tls_result(conn *c, int r) {
    if (r > 0) return r;
    int e = SSL_get_error(c->ssl, r);
    if (e == SSL_ERROR_ZERO_RETURN) return 0;
    errno = e == SSL_ERROR_WANT_READ || e == SSL_ERROR_WANT_WRITE ? EAGAIN : EPROTO;
    return -1;
}
static ssize_t get(conn *c, void *to, size_t n) {
    return c->ssl ? tls_result(c, SSL_read(c->ssl, to, (int)n)) : recv(c->fd, to, n, 0);
}
static ssize_t put(conn *c, const void *from, size_t n) {
    return c->ssl ? tls_result(c, SSL_write(c->ssl, from, (int)n)) : send(c->fd, from, n, MSG_NOSIGNAL);
}
static void shake_hands(conn *c) {
    errno = 0;
    if (!(c->ssl = SSL_new(ctx)) || !SSL_set_fd(c->ssl, c->fd) || SSL_connect(c->ssl) != 1) die("TLS handshake");
}
#else
static ssize_t get(conn *c, void *to, size_t n) { return recv(c->fd, to, n, 0); }
static ssize_t put(conn *c, const void *from, size_t n) { return send(c->fd, from, n, MSG_NOSIGNAL); }
static void shake_hands(conn *c) { (void)c; }
#endif
static void connect_blocking(conn *c) {
    c->fd = open_sock(c->idx);
    struct timeval tv = {.tv_sec = 10};
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    if (connect(c->fd, (struct sockaddr *)&sa, sizeof sa) < 0) die("connect");
    if (tls) shake_hands(c);
    nonblock(c->fd);
}
/* write what is left of the unit; returns 0 when the connection is broken */
static int push_unit(conn *c) {
    while (c->out < unit) {
        ssize_t r = put(c, pat + c->out, unit - c->out);
        if (r < 0) {
            if (errno != EAGAIN) return 0;
            if (!c->want_out) watch(c, EPOLL_CTL_MOD, 1);
            return 1;
        }
        c->out += (size_t)r;
    }
    if (c->want_out) watch(c, EPOLL_CTL_MOD, 0);
    return 1;
}
static void report(const char *mode, uint64_t t0, uint64_t t1, double amount, const char *unitname) {
    double secs = (t1 - t0) / 1e9;
    double p50 = 0, p99 = 0;
    if (nlat) {
        qsort(lat, nlat, sizeof *lat, cmp32);
        p50 = lat[nlat / 2] / 100.0;
        p99 = lat[(size_t)(nlat * 0.99)] / 100.0;
    }
    printf("{\"mode\": \"%s\", \"rate\": %.3f, \"unit\": \"%s\", \"amount\": %.3f, \"secs\": %.4f, "
           "\"p50_us\": %.2f, \"p99_us\": %.2f, \"errors\": %llu, \"lost\": %llu}\n",
           mode, amount / secs, unitname, amount, secs, p50, p99,
           (unsigned long long)errors, (unsigned long long)lost);
}
static void echo_units(const char *mode, conn *cs, int is_lines) {
    struct epoll_event ev[256];
    for (int i = 0; i < nconn; i++) { connect_blocking(&cs[i]); watch(&cs[i], EPOLL_CTL_ADD, 0); }
    usleep(30000);
    uint64_t start = now_ns(), end = start + (uint64_t)(tmax * 1e9), t = start;
    int alive = nconn;
    for (int i = 0; i < nconn; i++) { cs[i].t0 = t; if (!push_unit(&cs[i])) { errors++; } }
    uint64_t per = !is_lines ? 1 : head ? 2 * (uint64_t)batch : (uint64_t)batch;
    while (alive > 0 && ops < count) {
        int n = epoll_wait(ep, ev, 256, 200);
        t = now_ns();
        if (t >= end) break;
        for (int i = 0; i < n; i++) {
            conn *c = ev[i].data.ptr;
            if (ev[i].events & EPOLLOUT) if (!push_unit(c)) { errors++; }
            if (!(ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) continue;
            for (;;) {
                size_t room = unit - c->in;
                if (room > sizeof rbuf) room = sizeof rbuf;
                ssize_t r = get(c, rbuf, room);
                if (r < 0 && errno == EAGAIN) break;
                if (r <= 0) { errors++; alive--; epoll_ctl(ep, EPOLL_CTL_DEL, c->fd, 0); break; }
                if (memcmp(rbuf, pat + c->in, (size_t)r)) { printf("{\"error\": \"echo differs\"}\n"); exit(1); }
                c->in += (size_t)r;
                if (c->in == unit) {
                    uint64_t tn = now_ns();
                    add_lat(tn - c->t0);
                    ops += per;
                    c->in = c->out = 0; c->t0 = tn;
                    if (!push_unit(c)) { errors++; }
                    break;      /* nothing can be there yet */
                }
                if ((size_t)r < room && !tls) break;
            }
        }
    }
    report(mode, start, t, (double)ops, !is_lines ? "round trips/s" : head ? "chunks/s" : "lines/s");
}
static void bulk(conn *cs) {
    struct epoll_event ev[256];
    size_t big = 1 << 18;
    for (int i = 0; i < nconn; i++) { connect_blocking(&cs[i]); watch(&cs[i], EPOLL_CTL_ADD, 1); }
    uint64_t start = now_ns(), end = start + (uint64_t)(tmax * 1e9), t = start;
    int alive = nconn;
    uint64_t limit = count >= 1000000000ull ? ~0ull : count << 20;
    while (alive > 0 && bytes < limit) {
        int n = epoll_wait(ep, ev, 256, 200);
        t = now_ns();
        if (t >= end) break;
        for (int i = 0; i < n; i++) {
            conn *c = ev[i].data.ptr;
            if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
                for (int k = 0; k < (tls ? 64 : 8); k++) {
                    ssize_t r = get(c, rbuf, sizeof rbuf);
                    if (r < 0 && errno == EAGAIN) break;
                    if (r <= 0) { errors++; alive--; epoll_ctl(ep, EPOLL_CTL_DEL, c->fd, 0); goto next; }
                    /* the stream is a repetition of a 256 byte pattern */
                    if (rbuf[0] != pat[c->in & 255] || rbuf[r - 1] != pat[(c->in + (size_t)r - 1) & 255]) {
                        printf("{\"error\": \"echo differs\"}\n"); exit(1);
                    }
                    c->in += (size_t)r; bytes += (uint64_t)r;
                    if ((size_t)r < sizeof rbuf && !tls) break;
                }
                if (!c->want_out && c->out - c->in < window / 2) watch(c, EPOLL_CTL_MOD, 1);
            }
            if (c->want_out) {
                for (int k = 0; k < (tls ? 64 : 4); k++) {
                    if (c->out - c->in >= window) { watch(c, EPOLL_CTL_MOD, 0); break; }
                    ssize_t r = put(c, pat + (c->out & 255), big);
                    if (r < 0) { if (errno != EAGAIN) errors++; break; }
                    c->out += (size_t)r;
                    if ((size_t)r < big && !tls) break;
                }
            }
        next:;
        }
    }
    report("bulk", start, t, bytes / 1048576.0, "MiB/s");
}
static void start_connect(conn *c) {
    static int serial;
    c->fd = open_sock(serial++);
    nonblock(c->fd);
    c->in = c->out = 0; c->st = 0; c->t0 = now_ns();
    if (connect(c->fd, (struct sockaddr *)&sa, sizeof sa) < 0 && errno != EINPROGRESS) die("connect");
    watch(c, EPOLL_CTL_ADD, 1);
}
static void churn(conn *cs) {
    struct epoll_event ev[256];
    uint64_t start = now_ns(), end = start + (uint64_t)(tmax * 1e9), t = start;
    for (int i = 0; i < nconn; i++) start_connect(&cs[i]);
    while (ops < count) {
        int n = epoll_wait(ep, ev, 256, 200);
        t = now_ns();
        if (t >= end) break;
        for (int i = 0; i < n; i++) {
            conn *c = ev[i].data.ptr;
            int bad = 0;
            if (ev[i].events & EPOLLOUT && !push_unit(c)) bad = 1;
            if (!bad && ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
                ssize_t r = recv(c->fd, rbuf, sizeof rbuf, 0);
                if (r < 0 && errno == EAGAIN) continue;
                if (r <= 0) bad = 1;
                else {
                    if (memcmp(rbuf, pat + c->in, (size_t)r)) { printf("{\"error\": \"echo differs\"}\n"); exit(1); }
                    c->in += (size_t)r;
                    if (c->in < unit) continue;
                    ops++; add_lat(now_ns() - c->t0);
                }
            } else if (!bad) continue;
            if (bad) { if (++errors > 1000) { printf("{\"error\": \"too many broken connections\"}\n"); exit(1); } }
            close(c->fd);
            start_connect(c);
        }
    }
    report("churn", start, t, (double)ops, "connections/s");
}
static void idle(conn *cs) {
    for (int i = 0; i < nconn; i++) {
        connect_blocking(&cs[i]);
        if (exch) {
            struct pollfd p = {.fd = cs[i].fd, .events = POLLIN};
            size_t got = 0;
            if (put(&cs[i], pat, unit) != (ssize_t)unit) die("write");
            while (got < unit) {
                ssize_t r = get(&cs[i], rbuf, sizeof rbuf);
                if (r > 0) { got += (size_t)r; continue; }
                if (r == 0 || errno != EAGAIN) die("read");
                if (poll(&p, 1, 10000) <= 0) die("poll");
            }
        }
    }
    printf("ESTABLISHED %d\n", nconn); fflush(stdout);
    struct pollfd p = {.fd = 0, .events = POLLIN};
    poll(&p, 1, (int)(tmax * 1000));
}
static void dribble(conn *cs) {
    conn *c = &cs[0];
    size_t total = (size_t)count, sent = 0, got = 0;
    char *line = malloc(total + 2);
    memset(line, 'x', total); line[total] = '\r'; line[total + 1] = '\n'; total += 2;
    connect_blocking(c);
    uint64_t start = now_ns(), end = start + (uint64_t)(tmax * 1e9), t = start;
    while (got < total) {
        if (sent < total) {
            size_t n = total - sent < msg ? total - sent : msg;
            ssize_t r = put(c, line + sent, n);
            if (r > 0) sent += (size_t)r;
            else if (errno != EAGAIN) die("write");
        }
        ssize_t r = get(c, rbuf, sizeof rbuf);
        if (r > 0) { if (rbuf[0] != 'x' && rbuf[0] != '\r' && rbuf[0] != '\n') die("differs"); got += (size_t)r; }
        else if (r == 0) die("closed");
        else if (sent == total) { struct pollfd p = {.fd = c->fd, .events = POLLIN}; poll(&p, 1, 100); }
        t = now_ns();
        if (t > end) { errors++; break; }
    }
    report("dribble", start, t, got / 1048576.0, "MiB/s");
}
int main(int argc, char **argv) {
    if (argc < 2) { fprintf(stderr, "see the head of load.c\n"); return 2; }
    const char *mode = argv[1];
    int o;
    optind = 2;
    while ((o = getopt(argc, argv, "p:c:m:l:k:b:t:w:eT")) != -1) switch (o) {
        case 'p': port = atoi(optarg); break;
        case 'c': nconn = atoi(optarg); break;
        case 'm': msg = (size_t)atol(optarg); break;
        case 'l': head = (size_t)atol(optarg); break;
        case 'k': count = strtoull(optarg, 0, 10); break;
        case 'b': batch = atoi(optarg); break;
        case 't': tmax = atof(optarg); break;
        case 'w': window = (size_t)atol(optarg); break;
        case 'e': exch = 1; break;
        case 'T': tls = 1; break;
        default: return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    sa.sin_family = AF_INET; sa.sin_port = htons(port);
    sa.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (msg < 2 || head == 1 || head > msg || nconn < 1 || nconn > 20000 || tmax > 300) { fprintf(stderr, "bad option\n"); return 2; }
    if (tls) {
#ifdef WITH_TLS
        if (!(ctx = SSL_CTX_new(TLS_client_method()))) die("TLS");
        /* a write that comes back with EAGAIN is made again with the same bytes, and takes as many records as there is room for */
        SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
#else
        printf("{\"error\": \"the load generator was built without TLS\"}\n");
        return 1;
#endif
        if (!strcmp(mode, "churn")) { fprintf(stderr, "churn has no TLS\n"); return 2; }
    }
    ep = epoll_create1(0);
    caplat = 8u << 20; lat = malloc(caplat * sizeof *lat);
    conn *cs = calloc((size_t)nconn, sizeof *cs);
    for (int i = 0; i < nconn; i++) cs[i].idx = i;
    int is_lines = !strcmp(mode, "lines"), is_bulk = !strcmp(mode, "bulk");
    if (is_bulk) {
        unit = 256; pat = malloc((1 << 18) + 512);
        for (size_t i = 0; i < (1 << 18) + 512; i++) pat[i] = (char)(i & 255);
    } else {
        unit = is_lines ? msg * (size_t)batch : msg;
        pat = malloc(unit);
        for (size_t i = 0; i < unit; i++) pat[i] = (char)('a' + (i % msg) % 26);
        for (size_t i = head ? head : msg; i <= unit; i += msg) { pat[i - 2] = '\r'; pat[i - 1] = '\n'; }
    }
    if (is_lines) echo_units("lines", cs, 1);
    else if (is_bulk) bulk(cs);
    else if (!strcmp(mode, "pingpong")) echo_units("pingpong", cs, 0);
    else if (!strcmp(mode, "churn")) churn(cs);
    else if (!strcmp(mode, "idle")) idle(cs);
    else if (!strcmp(mode, "dribble")) dribble(cs);
    else { fprintf(stderr, "unknown mode\n"); return 2; }
    return 0;
}
