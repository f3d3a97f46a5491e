import gc
from amber_compile import derived
def chain(o, depth=0, seen=None):
    seen = seen or set()
    if depth > 7: return
    for r in gc.get_referrers(o):
        if id(r) in seen or type(r).__name__ in ("frame","list_iterator") or r is globals(): continue
        seen.add(id(r))
        print("  "*depth, type(r).__name__, (str(r)[:110] if not isinstance(r,(dict,list,tuple)) else (list(r)[:6] if isinstance(r,dict) else len(r))))
        if type(r).__name__ not in ("module",): chain(r, depth+1, seen)
        if len(seen)>60: return
def test_leak():
    gc.collect()
    ks=list(derived._factors.keys())
    print(len(ks), [tuple(k.shape) for k in ks[:4]])
    if ks:
        w=ks[0]; del ks
        chain(w)
    assert 0
