function klein_gordon(task)
% KLEIN_GORDON  Reference solutions of discrete Klein-Gordon control problems.
%
%   klein_gordon             solve every case below, write klein_gordon_<case>.mat
%                            and klein_gordon.csv into the current folder
%   klein_gordon known       reproduce optima found by other programs
%
% Find the control z for which the solution u of
%
%     u_tt - u_xx + r u + g u^p = f + z,    u(.,0) = u_0,  u_t(.,0) = 0
%
% stays close to d, alpha being the price of control.  With v = u_t, P1
% elements in space (width h) and steps tau = T/N in time, the problem is to
% minimize
%
%     J = sum_{i=0..N} w_i/2 |u_i - d_i|_M^2  +  alpha/2 size(z)^2
%
% with trapezoidal weights w = tau (1/2, 1, ..., 1, 1/2), subject to
%
%     F_k = M (u_k - u_{k-1}) - tau M (v_k + v_{k-1})/2                 = 0,
%     G_k = Q_I (v_k - v_{k-1}) + tau [ (A_I + r Q_I) (u_k + u_{k-1})/2
%                + g (nonlinear term) - Q_I (f + (z of step k)) ]       = 0
%
% for k = 1..N.  A and Q are the stiffness and mass matrices on all nodes, the
% index I means the rows of the free (interior) nodes, M the free rows and
% columns of Q.  The unknowns are u and v on the free nodes; on the boundary
% they are given.  The control lives on all nodes.  Two variants:
%
%   'boundary'  on (-1,1), r = 0, p = 2.  u = x cos t and v = -x sin t on the
%               boundary, u_0 = x, f = -x cos t + x^2 cos^2 t taken at the
%               middle of the step and interpolated, so that u = x cos t for
%               z = 0 and g = 1.  d = x cos t + sin(pi x) (t/T)^2.  The
%               nonlinear term is int ((u_k + u_{k-1})/2)^2 phi dx.
%               A control per step: size(z)^2 = sum_{k=1..N} tau |z_k|_Q^2.
%   'cubic'     on (0,1), r = 1, p = 3.  u = v = 0 on the boundary, f = 0,
%               u_0 = sin(pi x), d = 0.  The nonlinear term is lumped,
%               h (u_k^3 + u_{k-1}^3)/2 at each node.  A control per time level,
%               step k sees the mean (z_{k-1} + z_k)/2, and
%               size(z)^2 = sum_{i=0..N} w_i |z_i|_Q^2.
%
% Nothing here is clever: the whole of space-time is one sparse nonlinear
% system, the KKT conditions of L = J + sum_k (mu_k' F_k + lam_k' G_k), and
% Newton's method solves it with backslash.

  if nargin == 0
    store(cases());
  elseif strcmp(task, 'known')
    known();
  else
    error('klein_gordon: unknown task "%s"', task);
  end
end


function list = cases()
% Each row: name of the case, then what differs from the defaults.
  cubic = {'variant', 'cubic', 'T', 1, 'nt', 16};
  list = {
    'midpoint',      {}
    'linear',        {'g', 0,   'nx', 12, 'nt', 20, 'T', 6}
    'strong',        {'g', 5,   'nx', 20, 'nt', 24, 'T', 4,  'alpha', 1e-3}
    'attractive',    {'g', -1,  'nx', 13, 'nt', 25, 'T', 5,  'alpha', 0.1}
    'cheap',         {          'nx', 10, 'nt', 30, 'T', 3,  'alpha', 1e-5}
    'cubic',         cubic
    'cubic_strong',  [cubic, {'g', 50, 'nx', 15, 'nt', 24, 'alpha', 1e-4}]
    'cubic_long',    [cubic, {'g', -2, 'nx', 11, 'nt', 40, 'T', 4}]
  };
end


function p = parameters(varargin)
% The default problem, with name-value pairs replacing some of it.
  p = struct('nx', 16, 'nt', 32, 'alpha', 1e-2, 'g', 1, 'T', 12, ...
             'variant', 'boundary');
  for k = 1:2:nargin
    p.(varargin{k}) = varargin{k+1};
  end
end


function o = discretize(p)
% Space-time operators.  Vectors over space-time stack the time levels, so
% kron(T, X) applies the matrix X in space and the matrix T in time.
  cubic = strcmp(p.variant, 'cubic');
  if cubic
    ne = p.nx + 1;  left = 0;   r = 1;  o.p = 3;     % nx counts free nodes
  else
    ne = p.nx;      left = -1;  r = 0;  o.p = 2;     % nx counts elements
  end
  m = ne - 1;
  h = (1 - left)/ne;
  x = left + (1 - left)*(0:ne)'/ne;
  E = speye(ne+1);
  P = E(2:end-1, :);                         % all nodes -> free nodes

  % Space, by quadrature that is exact for cubics: two Gauss points an element.
  % G has the values of the hats there, D their derivatives on the elements.
  s = [1 - 1/sqrt(3), 1 + 1/sqrt(3)]/2;
  L = E(1:end-1, :);
  R = E(2:end, :);
  G = [(1-s(1))*L + s(1)*R;  (1-s(2))*L + s(2)*R];
  D = (R - L)/h;
  Q = h/2*(G'*G);                            % mass matrix, all nodes
  A = h*(D'*D) + r*Q;                        % stiffness and reaction
  M = P*Q*P';

  % Time.  Rows are the steps 1..N, columns the levels 0..N.
  N = p.nt;
  tau = p.T/N;
  t = tau*(0:N);
  I = speye(N);
  step = diff(speye(N+1));
  average = abs(step)/2;
  w = tau*[1/2; ones(N-1, 1); 1/2];          % trapezoidal, levels 0..N

  % Given values: all of level 0, and the boundary at all levels.
  if cubic
    u = [sin(pi*x), zeros(ne+1, N)];
    u([1 end], :) = 0;
    v = zeros(ne+1, N+1);
    f = zeros(ne+1, N);
    d = zeros(ne+1, N+1);
    C = average;
    weight = w;
  else
    u = x*cos(t);
    v = -x*sin(t);
    middle = x*cos((t(1:N) + t(2:end))/2);
    f = middle.^2 - middle;
    d = x*cos(t) + sin(pi*x)*(t/p.T).^2;
    C = I;
    weight = tau*ones(N, 1);
  end
  u(2:end-1, 2:end) = 0;                     % unknown: see fill below
  v(2:end-1, 2:end) = 0;
  later = speye(N+1);
  later(:, 1) = [];
  fill = kron(later, P');                    % unknowns -> their places

  % (F; G) = linear part + [0; out*(in*u).^p]
  lu = [kron(step, M*P); tau*kron(average, P*A)];
  lv = [-tau*kron(average, M*P); kron(step, P*Q)];
  o.Fx = [lu, lv]*blkdiag(fill, fill);
  o.Fz = [sparse(m*N, (ne+1)*size(C, 2)); -tau*kron(C, P*Q)];
  o.F0 = lu*u(:) + lv*v(:) - [zeros(m*N, 1); tau*kron(I, P*Q)*f(:)];
  if cubic
    in = speye((ne+1)*(N+1));
    out = p.g*tau*h*kron(average, P);
  else
    in = kron(average, G);
    out = p.g*tau*h/2*kron(I, P*G');
  end
  o.in0 = in*u(:);
  o.in = [in*fill, sparse(size(in, 1), m*N)];
  o.out = [sparse(m*N, size(out, 2)); out];

  o.Jxx = blkdiag(kron(diagonal(w(2:end)), M), sparse(m*N, m*N));
  o.Jzz = p.alpha*kron(diagonal(weight), Q);
  o.d = [reshape(P*d(:, 2:end), [], 1); zeros(m*N, 1)];
  e = P*(u(:, 1) - d(:, 1));
  o.J0 = w(1)/2*e'*M*e;                      % what level 0 adds to J
  o.start = [repmat(P*u(:, 1), N, 1); zeros(m*N, 1)];
  o.m = m;
end


function J = objective(o, x, z)
  e = x - o.d;
  J = o.J0 + e'*o.Jxx*e/2 + z'*o.Jzz*z/2;
end


function [F, Fx] = constraint(o, x, z)
% Both equations at x = (u, v), and their x-derivative; the z-derivative is the
% constant o.Fz.
  y = o.in*x + o.in0;
  F = o.Fx*x + o.Fz*z + o.F0 + o.out*y.^o.p;
  Fx = o.Fx + o.out*diagonal(o.p*y.^(o.p-1))*o.in;
end


function [r, K] = kkt(o, x, z, lam)
% Gradient of L(x, z, lam) and its Hessian, the KKT matrix.
  [F, Fx] = constraint(o, x, z);
  r = [o.Jxx*(x - o.d) + Fx'*lam
       o.Jzz*z + o.Fz'*lam
       F];
  if nargout > 1
    y = o.in*x + o.in0;
    q = o.p*(o.p-1)*y.^(o.p-2).*(o.out'*lam);
    Lxx = o.Jxx + o.in'*diagonal(q)*o.in;
    Z = sparse(numel(x), numel(z));
    O = sparse(numel(F), numel(F));
    K = [Lxx  Z      Fx'
         Z'   o.Jzz  o.Fz'
         Fx   o.Fz   O    ];
  end
end


function [x, z, lam, o, residual] = solve(p)
% Newton's method on the KKT system, from the initial state at all times.
  o = discretize(p);
  x = o.start;
  z = zeros(size(o.Fz, 2), 1);
  lam = zeros(size(o.Fz, 1), 1);
  n = numel(x);  l = numel(z);

  % Backtracking on the residual brings Newton to where it is quadratic, and
  % from there it goes on until rounding keeps the residual from falling.
  r = kkt(o, x, z, lam);
  for iteration = 1:50
    [~, K] = kkt(o, x, z, lam);
    step = -(K\r);
    t = 1;
    while true
      xn = x + t*step(1:n);
      zn = z + t*step(n+1:n+l);
      ln = lam + t*step(n+l+1:end);
      rn = kkt(o, xn, zn, ln);
      if norm(rn) <= (1 - t/10)*norm(r) || t < 1e-6, break, end
      t = t/2;
    end
    if norm(rn) >= norm(r), break, end
    x = xn;  z = zn;  lam = ln;  r = rn;
  end
  residual = norm(r, inf);
  assert(residual < 1e-12, 'Newton stopped at a residual of %g', residual);
end


function check_minimum(o, x, z, lam)
% A KKT point could be a saddle.  It is a strict local minimum if the Hessian
% of L is positive definite on the null space of [Fx Fz], spanned by [X; I].
  [~, Fx] = constraint(o, x, z);
  [~, K] = kkt(o, x, z, lam);
  n = numel(x);
  X = -full(Fx\o.Fz);
  H = X'*K(1:n, 1:n)*X + o.Jzz;
  [~, flag] = chol((H + H')/2);
  assert(flag == 0, 'not a minimum');
end


function store(list)
  csv = fopen('klein_gordon.csv', 'w');
  fprintf(csv, 'case,variant,nx,nt,T,alpha,g,objective,kkt_residual\n');
  for k = 1:size(list, 1)
    name = list{k, 1};
    p = parameters(list{k, 2}{:});
    [x, z, lam, o, residual] = solve(p);
    check_minimum(o, x, z, lam);

    s = p;                                   % time levels become rows
    levels = @(y) reshape(y, o.m, []).';
    n = numel(x)/2;
    s.u = levels(x(1:n));
    s.v = levels(x(n+1:end));
    s.z = reshape(z, o.m + 2, []).';
    s.mu = levels(lam(1:n));
    s.lam = levels(lam(n+1:end));
    s.objective = objective(o, x, z);
    s.kkt_residual = residual;
    save(['klein_gordon_' name '.mat'], '-struct', 's', '-v7');

    fprintf(csv, '%s,%s,%d,%d,%.15g,%.15g,%.15g,%.17g,%.2g\n', name, ...
            p.variant, p.nx, p.nt, p.T, p.alpha, p.g, s.objective, residual);
    fprintf('%-13s J = %.14f   residual %.1e\n', name, s.objective, residual);
  end
  fclose(csv);
end


function known()
% Optima of the cubic variant, and one of the other.
  optima = [ 16  0.092687799047
             32  0.092467998144
             64  0.092407139139 ];
  for row = optima'
    p = parameters('variant', 'cubic', 'T', 1, 'nx', row(1), 'nt', row(1));
    show(p, row(2), 1e-12);
  end
  show(parameters(), 0.5476383833738, 1e-13);
end


function show(p, expected, tolerance)
  [x, z, ~, o] = solve(p);
  J = objective(o, x, z);
  assert(abs(J - expected) < tolerance);
  fprintf('%-8s %2d x %2d: J = %.14f (known %.14g)\n', p.variant, p.nx, ...
          p.nt, J, expected);
end


function D = diagonal(x)
  D = spdiags(x, 0, numel(x), numel(x));
end
